// SPDX-License-Identifier: Apache-2.0
/// Lets the table pick where to split, runs head and tail with ONNX Runtime as device and server would, and compares
/// with the whole model.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dsc_split/load.hpp"
#include "tensor.hpp"

namespace {

/// A graph that ONNX Runtime has loaded: a head, a tail or the whole model.
class Graph {
 public:
  Graph(Ort::Env& environment, const std::string& path) : session_(environment, path.c_str(), Ort::SessionOptions{}) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
    }
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    }
  }

  [[nodiscard]] const std::vector<std::string>& inputs() const { return inputs_; }

  [[nodiscard]] ONNXTensorElementDataType input_type(const std::string& name) const {
    const auto position = std::find(inputs_.begin(), inputs_.end(), name) - inputs_.begin();
    return session_.GetInputTypeInfo(static_cast<std::size_t>(position)).GetTensorTypeAndShapeInfo().GetElementType();
  }

  /// Computes all outputs from those of the tensors that are inputs of the graph.
  [[nodiscard]] Tensors run(const Tensors& tensors) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> values;
    for (const std::string& name : inputs_) {
      const Tensor& tensor = tensors.at(name);
      // ONNX Runtime only reads inputs, but its API takes them by pointers to what may change.
      values.push_back(Ort::Value::CreateTensor(memory, const_cast<std::uint8_t*>(tensor.bytes.data()),
                                                tensor.bytes.size(), tensor.shape.data(), tensor.shape.size(),
                                                tensor.type));
    }
    const std::vector<const char*> input_names = pointers(inputs_);
    const std::vector<const char*> output_names = pointers(outputs_);
    const auto found = session_.Run(Ort::RunOptions{}, input_names.data(), values.data(), values.size(),
                                    output_names.data(), output_names.size());
    Tensors results;
    for (std::size_t i = 0; i < found.size(); ++i) {
      const auto info = found[i].GetTensorTypeAndShapeInfo();
      const auto* data = static_cast<const std::uint8_t*>(found[i].GetTensorRawData());
      const std::size_t size_bytes = info.GetElementCount() * element_of(info.GetElementType()).size_bytes;
      results[outputs_[i]] = Tensor{info.GetElementType(), info.GetShape(), {data, data + size_bytes}};
    }
    return results;
  }

 private:
  static std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> result;
    for (const std::string& name : names) result.push_back(name.c_str());
    return result;
  }

  Ort::Session session_;
  std::vector<std::string> inputs_;
  std::vector<std::string> outputs_;
};

/// What a choice runs on either side; nothing where it does not use that side.
struct Sides {
  std::optional<Graph> device;
  std::optional<Graph> server;
};

/// What the model gives, by name, and how many bytes were sent for it.
struct Answer {
  Tensors outputs;
  std::size_t sent_bytes = 0;
};

Sides load_sides(Ort::Env& environment, const std::string& bundle, const nlohmann::json& manifest,
                 const dsc_split::Choice& choice) {
  Sides sides;
  const std::string model = bundle + "/" + manifest.at("model").at("path").get<std::string>();
  if (choice.kind == dsc_split::Kind::full_offload) sides.server.emplace(environment, model);
  if (choice.kind == dsc_split::Kind::no_offload) sides.device.emplace(environment, model);
  if (choice.kind != dsc_split::Kind::split) return sides;
  for (const auto& split : manifest.at("splits")) {
    if (split.at("name").get_ref<const std::string&>() != choice.name) continue;
    sides.device.emplace(environment, bundle + "/" + split.at("head").get<std::string>());
    sides.server.emplace(environment, bundle + "/" + split.at("tail").get<std::string>());
    return sides;
  }
  throw std::runtime_error("the bundle has no split '" + std::string(choice.name) + "'");
}

/// Runs one request through both sides.
Answer run_choice(Sides& sides, const Tensors& inputs) {
  Answer answer;
  // What the head gives: what crosses the cut, and outputs of the model that are finished early.
  if (sides.device) answer.outputs = sides.device->run(inputs);
  if (!sides.server) return answer;
  // A tail takes what the head gave and, where it reads them too, inputs of the model.
  Tensors message;
  for (const std::string& name : sides.server->inputs()) {
    const auto from_head = answer.outputs.find(name);
    message[name] = from_head != answer.outputs.end() ? from_head->second : inputs.at(name);
    answer.sent_bytes += message[name].bytes.size();
  }
  answer.outputs.merge(sides.server->run(message));
  return answer;
}

/// Gives the shape of an input at a batch size; the size of its free dimension follows from the count of elements.
std::vector<std::int64_t> shape_at(const nlohmann::json& input, std::int64_t batch) {
  const auto counts = input.at("elements_by_batch").get<std::pair<std::int64_t, std::int64_t>>();
  std::int64_t free_size = counts.first * batch + counts.second;
  for (const auto& size : input.at("shape")) {
    if (size.is_number() && size.get<std::int64_t>() > 0) free_size /= size.get<std::int64_t>();
  }
  std::vector<std::int64_t> shape;
  for (const auto& size : input.at("shape")) shape.push_back(size.is_number() ? size.get<std::int64_t>() : free_size);
  return shape;
}

struct Options {
  std::string bundle = {};
  std::int64_t batch = 1;
  double rate_mb_s = 4.0;
  std::string choice = {};  // empty: what the table picks
};

std::optional<Options> read_options(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string_view name = arguments[i];
    if (name.substr(0, 2) != "--") {
      if (!options.bundle.empty()) return std::nullopt;
      options.bundle = name;
      continue;
    }
    if (++i == count) return std::nullopt;
    char* end = arguments[i];
    if (name == "--batch") {
      options.batch = std::strtoll(arguments[i], &end, 10);
    } else if (name == "--rate") {
      options.rate_mb_s = std::strtod(arguments[i], &end);
    } else if (name == "--choice") {
      options.choice = arguments[i];
      continue;
    }
    if (end == arguments[i] || *end != '\0') return std::nullopt;
  }
  return options.bundle.empty() ? std::nullopt : std::optional(options);
}

int run(const Options& options) {
  std::ifstream file(options.bundle + "/manifest.json");
  if (!file) throw std::runtime_error("'" + options.bundle + "' is no bundle: it has no manifest.json");
  const nlohmann::json manifest = nlohmann::json::parse(file);

  const auto loaded = dsc_split::load(options.bundle + "/table.json");
  if (!loaded) throw std::runtime_error(to_string(loaded.error()));
  const dsc_split::TableView& table = loaded->view();
  if (manifest.at("pair_id").get_ref<const std::string&>() != table.pair_id) {
    throw std::runtime_error("the table is of other pairs than the bundle has now: dsc-split bench " + options.bundle);
  }

  const auto pick = table.pick(options.batch, options.rate_mb_s);
  if (!pick) throw std::runtime_error(to_string(pick.error()));
  const std::int32_t position = options.choice.empty() ? pick->position : table.find(options.choice);
  if (position < 0) throw std::runtime_error("the table has no choice '" + options.choice + "'");
  const dsc_split::Choice& choice = table.choices[static_cast<std::size_t>(position)];
  std::printf("batch %lld at %g MB/s: %s, predicted %.2f ms\n", static_cast<long long>(options.batch),
              options.rate_mb_s, std::string(pick->choice->name).c_str(), pick->latency_ms);

  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "head_tail");
  Graph whole(environment, options.bundle + "/" + manifest.at("model").at("path").get<std::string>());
  std::mt19937 random;
  Tensors inputs;
  for (const auto& input : manifest.at("inputs")) {
    const auto& name = input.at("name").get_ref<const std::string&>();
    inputs[name] = made_up(whole.input_type(name), shape_at(input, options.batch), random);
  }

  Sides sides = load_sides(environment, options.bundle, manifest, choice);
  const Answer answer = run_choice(sides, inputs);
  std::printf("%s: %zu bytes sent\n", std::string(choice.name).c_str(), answer.sent_bytes);

  double worst = 0.0;
  for (const auto& [name, expected] : whole.run(inputs)) {
    worst = std::max(worst, relative_error(answer.outputs.at(name), expected));
  }
  const double tolerance = table.precision == "fp16" ? 2e-3 : 1e-5;
  std::printf("largest difference from the whole model: %.2g of the largest output; up to %g is right\n", worst,
              tolerance);
  return worst <= tolerance ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int count, char** arguments) {
  const auto options = read_options(count, arguments);
  if (!options) {
    std::cerr << "usage: head_tail BUNDLE [--batch N] [--rate MB/s] [--choice NAME]\n";
    return 2;
  }
  if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
    std::cerr << "ONNX Runtime " << OrtGetApiBase()->GetVersionString() << " is older than the headers that this was "
              << "compiled with (1." << ORT_API_VERSION << ")\n";
    return EXIT_FAILURE;
  }
  try {
    return run(*options);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
