"""What runs on the other side of sandbox.py: a warden that closes each program in, watches it and judges its tests.

sandbox.py sends the text of these files to a fresh interpreter in a jail, so they know the standard library only.
"""
