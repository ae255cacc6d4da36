"""The demo in the browser: what each tab computes, and the page itself (scripts/demo.py)."""
