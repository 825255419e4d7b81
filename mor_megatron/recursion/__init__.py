"""Mixture-of-Recursions itself, readable beside the paper: plan, routers, selection, losses, two ways to route."""
