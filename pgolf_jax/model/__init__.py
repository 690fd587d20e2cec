"""The model: parameters, one forward pass, its loss, its adapters.

Letters of array names (`x_BxTxD` has the axes B, T and D):

  B  rows                       L  physical layers
  T  positions of a row         P  positions of the layer list, in which looped layers stand several times
  D  width of the model         R  rank of an adapter
  H  query heads                V  vocabulary
  K  key and value heads        F  width of the MLP's hidden layer
  C  width of a head
"""
