"""One page that compares runs: what they left on disk, the pictures of it, and the page."""
