"""Drawings of captured graphs: what is drawn (layout.py), as SVG and for GraphViz."""
