"""Few bits while training and after, of whole models.

The integers themselves are in `methods.quantizers`; how weights beside the tables are kept, in `compression.backbone`.
"""
