"""Code that the tests share: servers, repositories, CI runners, and stand-ins for machines."""
