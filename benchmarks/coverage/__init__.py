"""Count the parameters of models in use that the plans of gcx.torch know."""
