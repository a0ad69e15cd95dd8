"""One module a framework; each is imported only by who asks for it."""
