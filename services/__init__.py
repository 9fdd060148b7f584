"""The two services, which talk only HTTP. The request handling that both need is in http.py."""
