"""The rewriter: reads a chat and its pictures, judges the risk, and writes a safe request.

protocol.py  the one text format: what the rewriter reads, what it writes, and how that is checked
sight.py     what stands beside the image tokens: text found in the pictures, and what the vision tower calls them
gate.py      a probability of risk for a chat
rewriter.py  the rewriters: packaged, local with an adapter, any endpoint
"""
