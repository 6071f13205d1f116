"""The same training in every framework, with and without centralization."""
