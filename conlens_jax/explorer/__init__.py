"""The local server: the page and the hosted API."""
