"""Inside the models of transformers."""
