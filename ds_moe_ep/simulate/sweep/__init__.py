"""A job scaled out."""
