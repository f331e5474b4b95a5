"""WebShop: the original's pages, reward and ranking, a generated catalogue, a demonstrator."""
