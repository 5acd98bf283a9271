"""The live page over run directories: a small server and one static page. See docs/dashboard.md."""
