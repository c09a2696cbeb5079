"""Drawings of captured graphs: what is drawn (model.py), as GraphViz text (dot.py) and as SVG."""
