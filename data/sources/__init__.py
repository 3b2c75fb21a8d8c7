"""Where images come from: for every kind of collection the list of its images, without reading them."""
