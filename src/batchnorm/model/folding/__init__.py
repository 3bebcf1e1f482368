"""fold: a deployment copy of a model without batch norm."""
