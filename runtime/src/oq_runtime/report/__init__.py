"""The report of a job: a page that needs nothing else, made from its datastore."""
