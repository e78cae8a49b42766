"""One page that shows a cut: what was asked, what went, where, and what it cost."""
