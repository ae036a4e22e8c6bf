// The engine, as limbeck.serving uses it.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>

#include "bindings.hpp"
#include "engine/engine.hpp"

namespace limbeck {
namespace {

using namespace nb::literals;

// Text of a file need not be valid UTF-8: what is not is kept as surrogates, so that it can be written back.
nb::object text_at(const uint8_t* data, size_t length) {
    PyObject* made = PyUnicode_DecodeUTF8(reinterpret_cast<const char*>(data), Py_ssize_t(length), "surrogateescape");
    if (made == nullptr) throw nb::python_error();
    return nb::steal(made);
}

nb::object scalar_at(ValueType type, const uint8_t* data) {
    const double value = number_at(type, data);
    switch (type) {
        case ValueType::boolean:
            return nb::bool_(value != 0);
        case ValueType::f32:
        case ValueType::f64:
            return nb::float_(value);
        case ValueType::u64: {
            uint64_t whole;
            std::memcpy(&whole, data, sizeof whole);
            return nb::int_(whole);
        }
        case ValueType::i64: {
            int64_t whole;
            std::memcpy(&whole, data, sizeof whole);
            return nb::int_(whole);
        }
        default:
            return nb::int_(int64_t(value));
    }
}

template <class T>
nb::object numbers(const MetaValue& value) {
    std::vector<T> found(size_t(value.count));
    if (!found.empty()) std::memcpy(found.data(), value.data, found.size() * sizeof(T));
    return nb::cast(to_numpy(std::move(found), {size_t(value.count)}));
}

// An array of numbers, in the width that the file has it in.
nb::object array_of(const MetaValue& value) {
    switch (value.element) {
        case ValueType::u8:
        case ValueType::boolean:
            return numbers<uint8_t>(value);
        case ValueType::i8:
            return numbers<int8_t>(value);
        case ValueType::u16:
            return numbers<uint16_t>(value);
        case ValueType::i16:
            return numbers<int16_t>(value);
        case ValueType::u32:
            return numbers<uint32_t>(value);
        case ValueType::i32:
            return numbers<int32_t>(value);
        case ValueType::u64:
            return numbers<uint64_t>(value);
        case ValueType::i64:
            return numbers<int64_t>(value);
        case ValueType::f32:
            return numbers<float>(value);
        default:
            return numbers<double>(value);
    }
}

nb::object to_python(const MetaValue& value) {
    if (value.type != ValueType::array && value.type != ValueType::string) return scalar_at(value.type, value.data);
    if (value.element != ValueType::string) return array_of(value);
    nb::list found;
    const uint8_t* at = value.data;
    for (uint64_t i = 0; i < value.count; ++i) {
        uint64_t length;
        std::memcpy(&length, at, sizeof length);
        found.append(text_at(at + 8, size_t(length)));
        at += 8 + length;
    }
    if (value.type == ValueType::array) return found;
    return found[0];
}

nb::dict metadata(const GgufFile& file) {
    nb::dict found;
    for (const auto& [key, value] : file.values()) {
        found[text_at(reinterpret_cast<const uint8_t*>(key.data()), key.size())] = to_python(value);
    }
    return found;
}

CacheKind cache_named(const std::string& name) {
    if (name == "f16") return CacheKind::f16;
    if (name == "f32") return CacheKind::f32;
    if (name == "int8") return CacheKind::int8;
    throw std::invalid_argument("cache is '" + name + "'; it is f16, f32 or int8.");
}

auto forward(Engine& engine, const std::vector<std::tuple<int64_t, std::vector<int32_t>, bool>>& wanted) {
    std::vector<Request> requests;
    for (const auto& [sequence, tokens, all] : wanted) requests.push_back({sequence, tokens, all});
    std::vector<float> logits;
    {
        nb::gil_scoped_release released;
        logits = engine.forward(requests);
    }
    const size_t vocabulary = engine.info().vocabulary, rows = logits.size() / vocabulary;
    return to_numpy(std::move(logits), {rows, vocabulary});
}

}  // namespace

void bind_engine(nb::module_& module) {
    nb::exception<FileError>(module, "FileError", PyExc_ValueError);
    nb::class_<GgufFile>(module, "GgufFile")
        .def(nb::init<const std::string&>(), "path"_a)
        .def("metadata", &metadata)
        .def("tensors", [](const GgufFile& file) {
            nb::list found;
            for (const auto& [name, info] : file.tensors()) {
                const char* type = type_name(info.type);
                found.append(nb::make_tuple(text_at(reinterpret_cast<const uint8_t*>(name.data()), name.size()),
                                            type ? std::string(type) : std::to_string(info.type), info.shape,
                                            info.bytes));
            }
            return found;
        });
    nb::class_<Engine>(module, "Engine")
        .def(
            "__init__",
            [](Engine* self, const std::string& path, int threads, bool pin, bool numa_aware, const std::string& cache,
               size_t tokens_at_once) {
                if (threads < 0 || threads > 1024)
                    throw std::invalid_argument("threads is " + std::to_string(threads) +
                                                "; it is 0 (every processor) to 1024.");
                if (tokens_at_once < 1 || tokens_at_once > 65536)
                    throw std::invalid_argument("tokens_at_once is " + std::to_string(tokens_at_once) +
                                                "; it is 1 to 65536.");
                const CacheKind kind = cache_named(cache);
                nb::gil_scoped_release released;
                new (self) Engine(path, {threads, {pin, numa_aware}, {kind}, tokens_at_once});
            },
            "path"_a, "threads"_a = 0, "pin"_a = false, "numa_aware"_a = false, "cache"_a = "f16",
            "tokens_at_once"_a = 512)
        .def("create", &Engine::create, nb::call_guard<nb::gil_scoped_release>())
        .def("drop", &Engine::drop, nb::call_guard<nb::gil_scoped_release>(), "sequence"_a)
        .def("fork", &Engine::fork, nb::call_guard<nb::gil_scoped_release>(), "sequence"_a)
        .def("truncate", &Engine::truncate, nb::call_guard<nb::gil_scoped_release>(), "sequence"_a, "length"_a)
        .def("length", &Engine::length, nb::call_guard<nb::gil_scoped_release>(), "sequence"_a)
        .def("bytes", &Engine::bytes, nb::call_guard<nb::gil_scoped_release>(), "sequence"_a)
        .def("forward", &forward, "requests"_a)
        .def("metadata", [](Engine& self) { return metadata(self.file()); })
        .def_prop_ro("can_truncate", &Engine::can_truncate)
        .def_prop_ro("architecture", [](Engine& self) { return self.info().architecture; })
        .def_prop_ro("vocabulary", [](Engine& self) { return self.info().vocabulary; })
        .def_prop_ro("context", [](Engine& self) { return self.info().context; })
        .def_prop_ro("parameters", [](Engine& self) { return self.info().parameters; })
        .def_prop_ro("weight_bytes_a_token", [](Engine& self) { return self.load().bytes; })
        .def_prop_ro("weights_a_token", [](Engine& self) { return self.load().weights; })
        .def_prop_ro("width", [](Engine& self) { return self.info().width; })
        .def_prop_ro("threads", [](Engine& self) { return self.pool().threads(); });
}

}  // namespace limbeck
