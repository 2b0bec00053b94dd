"""What the data says about a model: token counts, moments, the metric of the loss."""
