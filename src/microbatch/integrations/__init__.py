"""At home in other frameworks: one file each, which imports its framework, and which nothing else imports."""
