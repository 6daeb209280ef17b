"""A searchable collection of models"""
