"""What the commands of `vlmguard` do; cli.py says how they are called.

terminal.py  what a terminal shows: text from outside made harmless, errors in one line, JSON, progress
guard.py     one request
screen.py    a file of requests
listing.py   what there is
doctor.py    what is installed, cached and reachable
serve.py     the gateway
audit_log.py what is in its audit log
"""
