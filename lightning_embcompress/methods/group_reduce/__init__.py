"""GroupReduce: block-wise, frequency-weighted low rank with refinement."""
