"""Mixture-of-Recursions itself: plan, routers, selection, losses and the two ways to route. Readable beside the paper."""
