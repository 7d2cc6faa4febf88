"""Flows: order only. Deployments and the command line stand on them."""
