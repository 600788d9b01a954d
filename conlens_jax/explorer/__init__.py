"""The local server: the explorer's page and the NLA API."""
