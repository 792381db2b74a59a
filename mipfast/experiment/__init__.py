"""Hours of work in folders that a stopped run goes on from, and the pages that compare them."""
