"""Asks TensorFlow Serving over gRPC: python predict_grpc.py localhost:8500 robust images.npy

It needs grpcio, numpy and tensorflow-serving-api; images.npy holds uint8 [batch, height, width, channels].
"""

import sys

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

address, model, path = sys.argv[1:]
request = predict_pb2.PredictRequest()
request.model_spec.name, request.model_spec.signature_name = model, "serving_uint8"
request.inputs["image"].CopyFrom(tf.make_tensor_proto(np.load(path)))
with grpc.insecure_channel(address) as channel:
    answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
for name in ("class", "probabilities", "logits"):
    print(name, tf.make_ndarray(answer.outputs[name]).tolist())
