"""Look at a model and at documents, and write the experiment file of their extension."""
