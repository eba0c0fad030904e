"""Reading stores over a network."""
