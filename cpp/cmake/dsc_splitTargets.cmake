# Defines dsc_split::dsc_split (standard library only) and, where nlohmann/json is found, dsc_split::load.
include("${CMAKE_CURRENT_LIST_DIR}/dsc_splitPaths.cmake")

if(NOT TARGET dsc_split::dsc_split)
  add_library(dsc_split::dsc_split INTERFACE IMPORTED GLOBAL)
  set_target_properties(dsc_split::dsc_split PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${dsc_split_INCLUDE_DIR}"
    INTERFACE_COMPILE_FEATURES cxx_std_17)
endif()

# The project's own target of nlohmann/json goes first, then the folder it names, then a package, then any headers.
if(NOT TARGET nlohmann_json::nlohmann_json AND NOT dsc_split_JSON_INCLUDE_DIR)
  find_package(nlohmann_json 3 CONFIG QUIET)
  if(nlohmann_json_FOUND)
    set_target_properties(nlohmann_json::nlohmann_json PROPERTIES IMPORTED_GLOBAL TRUE)
  endif()
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_path(dsc_split_JSON_INCLUDE_DIR nlohmann/json.hpp DOC "The folder that has nlohmann/json.hpp")
endif()

set(_dsc_split_no_json "nlohmann/json, which was not found. Install it, or name the folder that has \
nlohmann/json.hpp with -Ddsc_split_JSON_INCLUDE_DIR=FOLDER.")
if(NOT TARGET dsc_split::load AND (TARGET nlohmann_json::nlohmann_json OR dsc_split_JSON_INCLUDE_DIR))
  add_library(dsc_split::load INTERFACE IMPORTED GLOBAL)
  target_link_libraries(dsc_split::load INTERFACE dsc_split::dsc_split)
  if(TARGET nlohmann_json::nlohmann_json)
    target_link_libraries(dsc_split::load INTERFACE nlohmann_json::nlohmann_json)
  else()
    target_include_directories(dsc_split::load INTERFACE "${dsc_split_JSON_INCLUDE_DIR}")
  endif()
endif()
