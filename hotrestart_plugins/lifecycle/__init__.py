"""What an instance does from its start to its exit: one table, which both servers drive."""
