"""What a run leaves for people: its facts, and the page that shows them."""
