"""Small tables in the formats that other engines read, found in the metric of the loss. One file a format."""
