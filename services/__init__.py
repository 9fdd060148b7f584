"""The two services. They share nothing but HTTP; what both do to every request is in http.py."""
