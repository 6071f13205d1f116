"""How many parameters of models in use the plans of gcx.torch know."""
