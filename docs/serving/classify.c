/* Classifies images by a SavedModel with TensorFlow's C API: no Python, no Keras, no robust_keras.
 *
 *     ./classify FOLDER FILE HEIGHT WIDTH CHANNELS INPUT LOGITS
 *
 * FILE holds the images one after the other, a byte for each value: height x width x channels, as `serving_uint8` takes
 * them. INPUT and LOGITS are the tensors that `saved_model_cli show` names, such as serving_uint8_image:0 and
 * StatefulPartitionedCall_1:1. Of each image it prints a line: its class, and its logits.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tensorflow/c/c_api.h>

static void fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

static void check(const char* what, const TF_Status* status) {
  if (TF_GetCode(status) != TF_OK) fail(what, TF_Message(status));
}

/* "name:0" in the graph. */
static TF_Output tensor_named(TF_Graph* graph, char* name) {
  char* colon = strrchr(name, ':');
  if (colon == NULL) fail(name, "expected a tensor's name, such as serving_uint8_image:0");
  *colon = '\0';
  TF_Output found = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  if (found.oper == NULL) fail(name, "no such operation in the graph");
  if (found.index < 0 || found.index >= TF_OperationNumOutputs(found.oper)) fail(name, "no such output");
  return found;
}

/* The bytes of a file; the number of images goes to `shape[0]`. */
static TF_Tensor* images_of(const char* path, int64_t shape[4]) {
  FILE* file = fopen(path, "rb");
  if (file == NULL || fseek(file, 0, SEEK_END) != 0) fail(path, "cannot be read");
  long size = ftell(file), image_size = shape[1] * shape[2] * shape[3];
  if (size < 0 || image_size <= 0 || size % image_size != 0) fail(path, "expected whole images");
  shape[0] = size / image_size;
  TF_Tensor* images = TF_AllocateTensor(TF_UINT8, shape, 4, (size_t)size);
  rewind(file);
  if (fread(TF_TensorData(images), 1, (size_t)size, file) != (size_t)size) fail(path, "cannot be read");
  fclose(file);
  return images;
}

static void print_rows(const char* name, const TF_Tensor* logits) {
  if (TF_TensorType(logits) != TF_FLOAT || TF_NumDims(logits) != 2) fail(name, "expected floats, a row for each image");
  const float* row = TF_TensorData(logits);
  int64_t num_classes = TF_Dim(logits, 1);
  for (int64_t i = 0; i < TF_Dim(logits, 0); ++i, row += num_classes) {
    int64_t best = 0;
    for (int64_t k = 1; k < num_classes; ++k) best = row[k] > row[best] ? k : best;
    printf("%lld", (long long)best);
    for (int64_t k = 0; k < num_classes; ++k) printf(" %.9g", row[k]);
    printf("\n");
  }
}

int main(int argc, char** argv) {
  if (argc != 8) {
    fprintf(stderr, "Usage: %s FOLDER FILE HEIGHT WIDTH CHANNELS INPUT LOGITS\n", argv[0]);
    return 2;
  }
  int64_t shape[4] = {0, atol(argv[3]), atol(argv[4]), atol(argv[5])};
  TF_Tensor* images = images_of(argv[2], shape);

  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(argv[1], status);

  TF_Output input = tensor_named(graph, argv[6]), output = tensor_named(graph, argv[7]);
  TF_Tensor* logits = NULL;
  TF_SessionRun(session, NULL, &input, &images, 1, &output, &logits, 1, NULL, 0, NULL, status);
  check(argv[2], status);
  print_rows(argv[7], logits);

  TF_DeleteTensor(images);
  TF_DeleteTensor(logits);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
