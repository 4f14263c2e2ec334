"""A linear map of every parameter's gradient that evens out its spectrum, before a projection."""
