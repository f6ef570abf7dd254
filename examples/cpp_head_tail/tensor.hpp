// SPDX-License-Identifier: Apache-2.0
/// Tensors as they go over a network: type, shape and bytes. Made up as inputs, and compared.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<std::int64_t> shape = {};
  std::vector<std::uint8_t> bytes = {};
};

using Tensors = std::map<std::string, Tensor>;

/// How numbers of one type are read and written.
struct Element {
  std::size_t size_bytes;
  bool whole;  // whole numbers have to be equal, not near
  double (*read)(const std::uint8_t* at);
  void (*write)(double value, std::uint8_t* at);
};

/// Describes a type that converts from and to `Via`.
template <class T, class Via = T>
Element element() {
  return {sizeof(T), std::is_integral_v<T>,
          [](const std::uint8_t* at) {
            T value{};
            std::memcpy(static_cast<void*>(&value), at, sizeof value);
            return static_cast<double>(static_cast<Via>(value));
          },
          [](double number, std::uint8_t* at) {
            const T value = static_cast<T>(static_cast<Via>(number));
            std::memcpy(at, static_cast<const void*>(&value), sizeof value);
          }};
}

inline Element element_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return element<float>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return element<double>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return element<Ort::Float16_t, float>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return element<Ort::BFloat16_t, float>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return element<std::int8_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return element<std::int16_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return element<std::int32_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return element<std::int64_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return element<std::uint8_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return element<std::uint16_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32: return element<std::uint32_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64: return element<std::uint64_t>();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return element<bool>();
    default: throw std::runtime_error("tensors of ONNX type " + std::to_string(type) + " are not known here");
  }
}

inline std::size_t count(const std::vector<std::int64_t>& shape) {
  std::size_t elements = 1;
  for (const std::int64_t size : shape) elements *= static_cast<std::size_t>(size);
  return elements;
}

/// Makes up a tensor: normal numbers for floats, 0 and 1 for the rest.
inline Tensor made_up(ONNXTensorElementDataType type, std::vector<std::int64_t> shape, std::mt19937& random) {
  const Element element = element_of(type);
  Tensor tensor{type, std::move(shape), {}};
  tensor.bytes.resize(count(tensor.shape) * element.size_bytes);
  std::normal_distribution<double> normal;
  std::bernoulli_distribution coin;
  for (std::size_t at = 0; at < tensor.bytes.size(); at += element.size_bytes) {
    element.write(element.whole ? static_cast<double>(coin(random)) : normal(random), &tensor.bytes[at]);
  }
  return tensor;
}

/// Gives the largest difference over the largest expected magnitude; infinite where type, shape, NaN or a whole
/// number differ.
inline double relative_error(const Tensor& found, const Tensor& expected) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (found.type != expected.type || found.shape != expected.shape) return infinity;
  if (found.bytes == expected.bytes) return 0.0;
  const Element element = element_of(expected.type);
  if (element.whole) return infinity;
  double largest = 0.0;
  double difference = 0.0;
  for (std::size_t at = 0; at < expected.bytes.size(); at += element.size_bytes) {
    const double a = element.read(&found.bytes[at]);
    const double b = element.read(&expected.bytes[at]);
    if (std::isnan(a) != std::isnan(b)) return infinity;
    if (a == b || std::isnan(a)) {
      if (std::isfinite(b)) largest = std::max(largest, std::fabs(b));
      continue;
    }
    largest = std::max(largest, std::fabs(b));
    difference = std::max(difference, std::fabs(a - b));
  }
  if (difference == 0.0) return 0.0;
  return std::isfinite(difference) && largest > 0.0 ? difference / largest : infinity;
}
