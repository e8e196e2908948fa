"""This computer: the means to start machines, and the requests that a project makes of it."""
