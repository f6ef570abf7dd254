"""What tests of several rooms share: builders of bundles, tables and graphs, and programs that they run."""
