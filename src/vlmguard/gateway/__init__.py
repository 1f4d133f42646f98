"""The gateway: a guard in front of any VLM server, for clients that change nothing but their base URL.

client bytes -> key, queue, limits -> one parse (wire) -> guard -> the target, passed through -> audit log, metrics
"""
