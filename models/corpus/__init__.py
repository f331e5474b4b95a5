"""What tiny bases learn from: demonstrations in ALFWorld and WebShop, and random walks (neutral)."""
