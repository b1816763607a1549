// ---- ONNX Runtime's C API, owned -----------------------------------------------------------------------------------

const OrtApi& api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (found == nullptr)
    fail(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + " is older than the headers this app was built with (1." +
         std::to_string(ORT_API_VERSION) + "); ship a newer library");
  return *found;
}

void check(OrtStatus* status, const std::string& what) {
  if (status == nullptr) return;
  std::string line = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  std::replace(line.begin(), line.end(), '\n', ' ');
  fail(what + ": " + line.substr(0, 300));
}

struct Release {
  void operator()(OrtEnv* p) const { api().ReleaseEnv(p); }
  void operator()(OrtSession* p) const { api().ReleaseSession(p); }
  void operator()(OrtSessionOptions* p) const { api().ReleaseSessionOptions(p); }
  void operator()(OrtIoBinding* p) const { api().ReleaseIoBinding(p); }
  void operator()(OrtValue* p) const { api().ReleaseValue(p); }
  void operator()(OrtTensorTypeAndShapeInfo* p) const { api().ReleaseTensorTypeAndShapeInfo(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Release>;
using Value = Owned<OrtValue>;
using Shape = std::vector<std::int64_t>;

struct Type {
  const char* name;
  ONNXTensorElementDataType onnx;
  std::size_t bytes;
};
constexpr Type kTypes[] = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}, {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},   {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
    {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},     {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1},
};

const Type& type_named(const std::string& name) {
  for (const Type& type : kTypes)
    if (name == type.name) return type;
  fail("app.json has a tensor of the type " + name + ", which this client does not know; embed the bundle again");
}

std::size_t count_of(const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
  return count;
}

// A tensor of zeros in the runtime's own memory.
Value zeros(const Type& type, const Shape& shape) {
  OrtAllocator* allocator = nullptr;
  check(api().GetAllocatorWithDefaultOptions(&allocator), "memory");
  OrtValue* value = nullptr;
  check(api().CreateTensorAsOrtValue(allocator, shape.data(), shape.size(), type.onnx, &value), "memory for the model's states");
  Value owned(value);
  void* data = nullptr;
  check(api().GetTensorMutableData(value, &data), "a tensor");
  std::memset(data, 0, count_of(shape) * type.bytes);
  return owned;
}

template <class T>
T* data_of(const Value& value) {
  void* data = nullptr;
  check(api().GetTensorMutableData(value.get(), &data), "a tensor");
  return static_cast<T*>(data);
}

Value ints(std::span<const Token> values, const Shape& shape) {
  Value value = zeros(type_named("int64"), shape);
  std::copy(values.begin(), values.end(), data_of<Token>(value));
  return value;
}

Shape shape_of(const Value& value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api().GetTensorTypeAndShape(value.get(), &info), "a tensor");
  const Owned<OrtTensorTypeAndShapeInfo> owned(info);
  std::size_t rank = 0;
  check(api().GetDimensionsCount(info, &rank), "a tensor");
  Shape shape(rank);
  check(api().GetDimensions(info, shape.data(), rank), "a tensor");
  return shape;
}

OrtEnv* environment() {
  static const Owned<OrtEnv> env = [] {
    OrtEnv* made = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "edgewright", &made), "ONNX Runtime does not start");
    return Owned<OrtEnv>(made);
  }();
  return env.get();
}

Owned<OrtSession> open_graph(const fs::path& file, int threads, const std::string& wanted) {
  OrtSessionOptions* made = nullptr;
  check(api().CreateSessionOptions(&made), "ONNX Runtime");
  const Owned<OrtSessionOptions> options(made);
  check(api().SetIntraOpNumThreads(made, threads), "threads");
  check(api().SetInterOpNumThreads(made, 1), "threads");
  check(api().SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_FATAL), "ONNX Runtime");
  OrtSession* session = nullptr;
  check(api().CreateSession(environment(), file.c_str(), made, &session),
        shown(file) + " does not open in ONNX Runtime " + OrtGetApiBase()->GetVersionString() + " (it needs " + wanted + ")");
  return Owned<OrtSession>(session);
}

struct Port {
  std::string name;
  std::string type;
  Json shape;  // numbers and names
  bool kv = false, updated = false;

  Shape sized(std::size_t capacity) const {
    Shape sizes;
    for (const Json& size : shape) {
      if (size.is_number()) {
        sizes.push_back(size.get<std::int64_t>());
      } else {
        sizes.push_back(size.get<std::string>() == "batch" ? 1 : static_cast<std::int64_t>(capacity));
      }
    }
    return sizes;
  }
};

struct Graph {
  std::vector<Port> inputs, outputs, states;
  Owned<OrtSession> session;

  bool reads(const std::string& name) const {
    return std::any_of(inputs.begin(), inputs.end(), [&name](const Port& port) { return port.name == name; });
  }
};

using Named = std::map<std::string, Value>;

// A graph run once, its outputs in memory of the runtime.
Named run_once(const Graph& graph, const Named& given) {
  std::vector<const char*> names, wanted;
  std::vector<const OrtValue*> values;
  for (const Port& port : graph.inputs) {
    names.push_back(port.name.c_str());
    values.push_back(given.at(port.name).get());
  }
  for (const Port& port : graph.outputs) wanted.push_back(port.name.c_str());
  std::vector<OrtValue*> made(wanted.size(), nullptr);
  check(api().Run(graph.session.get(), nullptr, names.data(), values.data(), names.size(), wanted.data(), wanted.size(), made.data()),
        "the model does not run");
  Named results;
  for (std::size_t i = 0; i < wanted.size(); ++i) results[wanted[i]] = Value(made[i]);
  return results;
}

// A graph with states, called again and again. A KV cache is one buffer, written in place; other states have two that change places.
class Calls {
 public:
  // held: values that outlive this: states that the graph only reads, inputs that stay.
  Calls(const Graph& graph, std::size_t capacity, const Named& held) : graph_(graph) {
    bool swaps = false;
    for (const Port& state : graph.states) swaps |= state.updated && !state.kv;
    turns_.resize(swaps ? 2 : 1);
    for (auto& turn : turns_) {
      OrtIoBinding* binding = nullptr;
      check(api().CreateIoBinding(graph.session.get(), &binding), "ONNX Runtime");
      turn.reset(binding);
    }
    for (const Port& state : graph.states) {
      if (!state.updated) {
        for (auto& turn : turns_) check(api().BindInput(turn.get(), state.name.c_str(), held.at(state.name).get()), state.name);
        continue;
      }
      const Type& type = type_named(state.type);
      const OrtValue* one = keep(zeros(type, state.sized(capacity)));
      const OrtValue* two = state.kv ? one : keep(zeros(type, state.sized(capacity)));
      const std::string out = state.name + "_out";
      for (std::size_t i = 0; i < turns_.size(); ++i) {
        check(api().BindInput(turns_[i].get(), state.name.c_str(), i == 0 ? one : two), state.name);
        check(api().BindOutput(turns_[i].get(), out.c_str(), i == 0 ? two : one), out);
      }
    }
    for (const auto& [name, value] : held)
      if (graph.reads(name)) input(name, value.get());
  }

  void input(const std::string& name, const OrtValue* value) {
    for (auto& turn : turns_) check(api().BindInput(turn.get(), name.c_str(), value), name);
  }

  void output(const std::string& name, const OrtValue* value) {
    for (auto& turn : turns_) check(api().BindOutput(turn.get(), name.c_str(), value), name);
  }

  void run() {
    check(api().RunWithBinding(graph_.session.get(), nullptr, turns_[next_].get()), "the model does not run");
    next_ = (next_ + 1) % turns_.size();
  }

 private:
  const OrtValue* keep(Value value) {
    kept_.push_back(std::move(value));
    return kept_.back().get();
  }

  const Graph& graph_;
  std::vector<Owned<OrtIoBinding>> turns_;
  std::vector<Value> kept_;
  std::size_t next_ = 0;
};
