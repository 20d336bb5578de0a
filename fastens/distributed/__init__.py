"""Ensembles on several devices: members and rows over a mesh of torch.distributed."""
