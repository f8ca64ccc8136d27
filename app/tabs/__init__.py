"""The tabs of the page, a module each: components, and handlers that turn what a run shows into them."""
