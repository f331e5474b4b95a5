"""WebShop: pages, reward and ranking of the original, a generated catalogue, a demonstrator."""
