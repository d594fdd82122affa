"""What happens after training: embed a collection, index it, search it, and a page to search with."""
