"""Small changes of gcx, made by mutmut, one at a time, and the tests that notice them."""
